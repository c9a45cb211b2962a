"""The pages in a real browser: phone and desk, light and dark, sound, keyboard, and no request that leaves them."""

import json
import shutil
import time
from pathlib import Path

import pytest
from browser import Browser, find_chromium

from s2quant.report import write_report

pytestmark = pytest.mark.skipif(find_chromium() is None, reason="needs Chromium (Debian: apt-get install chromium)")

HOSTILE = "<script>window.pwned=1</script>\"'><img src=x onerror='window.pwned=1'>"

CONTRAST = """
(() => {
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const rgba = (color) => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = color;
    canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const light = (color) => {
    const [r, g, b] = color.slice(0, 3).map((v) => v / 255)
      .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = (element) => {
    for (; element; element = element.parentElement) {
      const color = rgba(getComputedStyle(element).backgroundColor);
      if (color[3] === 255) return color;
    }
    return [255, 255, 255, 255];
  };
  const bad = new Set();
  for (const element of document.body.querySelectorAll("*")) {
    if (![...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim())) continue;
    if (["SCRIPT", "STYLE", "title"].includes(element.tagName)) continue;
    const style = getComputedStyle(element);
    const ink = rgba(element.closest("svg") ? style.fill : style.color);
    const pair = [light(ink), light(ground(element))].sort((a, b) => b - a);
    const ratio = (pair[0] + 0.05) / (pair[1] + 0.05);
    if (ratio < 4.5) bad.add(`${element.tagName}.${element.getAttribute("class")} ${ratio.toFixed(2)}`);
  }
  return [...bad];
})()
"""
LOAD_ALL = """
(async () => {
  const failed = [];
  for (const player of document.querySelectorAll("audio")) {
    const loaded = new Promise((resolve) => {
      player.onloadedmetadata = () => resolve(Number.isFinite(player.duration) && player.duration > 0.3);
      player.onerror = () => resolve(false);
      setTimeout(() => resolve(false), 5000);
    });
    player.preload = "auto";
    player.load();
    if (!(await loaded) || player.readyState < 1) failed.push(player.getAttribute("aria-label"));
    const src = player.src;
    player.removeAttribute("src");
    player.load();
    player.preload = "none";
    player.src = src;
  }
  return failed;
})()
"""


@pytest.fixture(scope="module")
def report(sample_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sample with hostile texts."""
    folder = tmp_path_factory.mktemp("browser") / "run"
    shutil.copytree(sample_folder, folder)
    lines = (folder / "records.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    for record in records:
        record["text"] += HOSTILE
        record["asr"]["alignment"].append(["insert", [], [HOSTILE]])
    (folder / "records.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    write_report(folder)
    return folder


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory):
    with Browser(tmp_path_factory.mktemp("profile")) as found:
        yield found


@pytest.mark.parametrize("page", ["report.html", "blind.html"])
@pytest.mark.parametrize("width", [1280, 390, 320])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_page_fits_reads_and_keeps_to_itself(browser, report, page, width, dark):
    browser.open(report / page, width, dark)
    assert browser.run("document.querySelectorAll('details').forEach((d) => (d.open = true))") is None
    wide, inner = browser.run("[document.documentElement.scrollWidth, innerWidth]")
    assert wide <= inner <= width
    assert browser.run(CONTRAST) == []
    assert browser.complaints() == []
    assert browser.requests() == [(report / page).resolve().as_uri()]
    assert browser.run("window.pwned ?? null") is None


@pytest.mark.parametrize("page", ["report.html", "blind.html"])
def test_every_player_loads(browser, report, page):
    browser.open(report / page, 1280)
    assert browser.run("document.querySelectorAll('audio').length") >= 32
    assert browser.run(LOAD_ALL) == []
    assert browser.complaints() == []
    root = report.resolve().as_uri()
    assert all(url.startswith(root) for url in browser.requests())


def test_one_clip_plays_at_a_time(browser, report):
    browser.open(report / "report.html", 1280)
    playing = """
    (async () => {
      const [one, two] = document.querySelectorAll("audio");
      await one.play();
      await two.play();
      await new Promise((resolve) => setTimeout(resolve, 50));
      return [one.paused, two.paused];
    })()
    """
    assert browser.run(playing) == [True, False]
    browser.key("Escape", "Escape", 27)
    assert browser.run("[...document.querySelectorAll('audio')].every((player) => player.paused)") is True


def test_keyboard_reaches_everything(browser, report):
    browser.open(report / "report.html", 1280)
    seen = []
    for _ in range(14):
        browser.key("Tab", "Tab", 9)
        seen.append(browser.run("document.activeElement.tagName + '.' + document.activeElement.className"))
    assert seen[0] == "A.skip"
    assert "DIV.scroll" in seen
    assert browser.run("getComputedStyle(document.activeElement).outlineStyle") == "solid"


def test_blind_answers_are_given_saved_and_scored_by_keyboard(browser, report, tmp_path):
    browser.open(report / "blind.html", 390)
    browser.send("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path))
    browser.run("document.querySelector('fieldset input').focus()")
    browser.key(" ", "Space", 32, " ")
    browser.key("ArrowDown", "ArrowDown", 40)
    assert browser.run("document.querySelector('fieldset input:checked').value") == "none"
    browser.run("document.querySelectorAll('fieldset')[1].querySelector('[value=a]').click()")
    assert browser.run("document.getElementById('progress').textContent").startswith("2 of 16")
    browser.run("document.getElementById('save').focus()")
    browser.key("Enter", "Enter", 13, "\r")
    key = json.loads((report / "blind-key.json").read_text(encoding="utf-8"))
    saved = tmp_path / f"blind-answers-{key['test']}.json"
    until = time.monotonic() + 10
    while not saved.exists() and time.monotonic() < until:
        time.sleep(0.05)
    answers = json.loads(saved.read_text(encoding="utf-8"))
    assert [answer["choice"] for answer in answers["answers"][:3]] == ["none", "a", None]
    assert (answers["test"], answers["blind_version"], len(answers["answers"])) == (key["test"], 1, 16)

    node = browser.send("Runtime.evaluate", expression="document.getElementById('key')")["result"]["objectId"]
    browser.send("DOM.setFileInputFiles", files=[str(report / "blind-key.json")], objectId=node)
    wait = "new Promise((r) => setTimeout(() => r(document.getElementById('score').textContent), 300))"
    arm = key["pairs"][1]["a"]
    assert f"{arm} {'sounded better ' if arm == 'model' else ''}in 1" in browser.run(wait)
    assert "Sign test p = 1.000" in browser.run("document.getElementById('score').textContent")
    assert browser.complaints() == []
