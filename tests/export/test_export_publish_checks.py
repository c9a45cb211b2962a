"""What `publish` refuses: figures of another model, a broken folder; and what an export has from its source."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from folder_cases import NORM, REPOSITORY, SINGLE, WQKV, change_json, change_tensors, link_copy, replace_bytes
from huggingface_hub import HfApi, ModelCard

sys.path.append(str(REPOSITORY / "tests" / "report"))
import sample

from s2quant.checkpoint.foreign import FOREIGN
from s2quant.checkpoint.reader import open_checkpoint
from s2quant.cli import main
from s2quant.errors import UserError
from s2quant.export.profiles import PROFILES, Profile, export_checkpoint
from s2quant.export.publish import START, prepare
from s2quant.export.publish_checks import is_model_file
from s2quant.export.tensors import split
from s2quant.export.verify import inspect_folder
from s2quant.records import folder_hashes


@pytest.fixture
def evaluated(tmp_path: Path, tiny_quantized: Path, tiny_folder: Path) -> Callable[[dict[str, Any]], Path]:
    """Give a function that makes an evaluation of the quantized folder, with other inputs where named."""

    def make(more: dict[str, Any]) -> Path:
        results = sample.results()
        inputs = {"baseline": folder_hashes(tiny_folder), "model": folder_hashes(tiny_quantized)}
        results["provenance"]["inputs"] = inputs | more
        folder = tmp_path / "run"
        folder.mkdir()
        (folder / "results.json").write_text(json.dumps(results), encoding="utf-8")
        return folder

    return make


def without_hashes(folder: Path) -> None:
    change_json(folder, lambda table: table.pop("files_sha256", None), "manifest.json")


def one_byte(folder: Path) -> None:
    content = bytearray((folder / SINGLE).read_bytes())
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    content[8 + length + header[NORM]["data_offsets"][0]] ^= 1  # the last bit of a bf16 weight
    replace_bytes(folder / SINGLE, bytes(content))


def test_one_changed_byte_is_another_model(
    tiny_quantized: Path, tmp_path: Path, evaluated: Callable[..., Path]
) -> None:
    model = link_copy(tiny_quantized, tmp_path / "copy")
    without_hashes(model)
    run = evaluated({})
    prepare(model, tmp_path / "good", run, None)
    one_byte(model)
    with pytest.raises(UserError, match=r"measured another model than .*copy: model\.safetensors differs"):
        prepare(model, tmp_path / "hub", run, None)
    assert not (tmp_path / "hub").exists()


def test_the_baseline_does_not_get_the_models_figures(tiny_folder: Path, tmp_path: Path,
                                                      evaluated: Callable[..., Path]) -> None:  # fmt: skip
    with pytest.raises(
        UserError, match=r"its baseline: config\.json, model\.safetensors, quantize_config\.json differ"
    ):
        prepare(tiny_folder, tmp_path / "hub", evaluated({}), None)


def test_a_committed_evaluation(tmp_path: Path) -> None:
    run = REPOSITORY / "reports" / "2026-11-26-s2-mini-w4a16"
    inputs = json.loads((run / "results.json").read_text("utf-8"))["provenance"]["inputs"]
    assert {name for name in inputs["model"] if not is_model_file(name)} == {"README.md"}


@pytest.mark.parametrize("inputs", [{"model": {}}, {"model": None}, {"model": {"README.md": "ab" * 32}}])
def test_figures_of_an_unknown_model_are_refused(inputs: dict[str, Any], tiny_quantized: Path, tmp_path: Path,
                                                 evaluated: Callable[..., Path]) -> None:  # fmt: skip
    with pytest.raises(UserError, match="no hashes of the model that it measured"):
        prepare(tiny_quantized, tmp_path / "hub", evaluated(inputs), None)


def test_an_edited_card_is_still_the_same_model(tiny_quantized: Path, tmp_path: Path,
                                                evaluated: Callable[..., Path]) -> None:  # fmt: skip
    model = link_copy(tiny_quantized, tmp_path / "copy")
    replace_bytes(model / "README.md", b"# My model\n")
    prepare(model, tmp_path / "hub", evaluated({}), None)
    assert (tmp_path / "hub" / "README.md").read_text("utf-8").count("# My model") == 1


def nan_scale(folder: Path) -> None:
    without_hashes(folder)
    change_tensors(folder, lambda tensors: tensors[f"{WQKV}.scales"].view(-1)[:1].fill_(float("nan")))


@pytest.mark.parametrize(
    ("damage", "fault"),
    [
        (nan_scale, "scales: 1 values are not finite"),
        (one_byte, "model.safetensors is not the file that manifest.json has the hash of"),
        (lambda folder: (folder / "chat_template.jinja").unlink(), "chat_template.jinja is in manifest.json, but not"),
        (lambda folder: change_json(folder, lambda t: t.update(files_sha256=[]), "manifest.json"), "no JSON object"),
        (lambda folder: replace_bytes(folder / "codec.pth", b"no codec"), "codec.pth"),
    ],
)
def test_a_broken_folder_is_refused(damage: Callable[[Path], None], fault: str, tiny_quantized: Path, tmp_path: Path,
                                    capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    model = link_copy(tiny_quantized, tmp_path / "copy")
    damage(model)
    assert main(["publish", str(model)]) == 2
    assert fault in capsys.readouterr().err
    assert not (tmp_path / "copy.hub").exists()


EXPORTS: dict[Profile, str] = {
    "bf16": "the same weights, here dequantized to bfloat16",
    "vllm-omni": "the same weights in another layout; vllm-omni itself was not measured",
    "sglang-omni": "the same weights in another layout; sglang-omni itself was not measured",
}


@pytest.fixture(scope="module")
def exports(tiny_quantized: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an export of the quantized folder in each of EXPORTS; read only."""
    folder = tmp_path_factory.mktemp("exports")
    for profile in EXPORTS:
        export_checkpoint(tiny_quantized, folder / profile, profile)
    return folder


@pytest.mark.parametrize("profile", EXPORTS)
def test_an_export_has_recipe_and_figures_of_its_source(profile: Profile, exports: Path, tiny_quantized: Path,
                                                        tmp_path: Path, evaluated: Callable[..., Path],
                                                        monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.setattr(HfApi, "create_repo", lambda *a, **k: None)
    monkeypatch.setattr(HfApi, "upload_folder", lambda *a, **k: "commit")
    words = ["publish", str(exports / profile), "--eval", str(evaluated({})), "--out", str(tmp_path / "hub")]
    assert main(words) == 0
    card = ModelCard.load(tmp_path / "hub" / "README.md")
    sentence = f"Measured by s2quant on the folder that this one was exported from: {EXPORTS[profile]}. "
    assert card.text.index(START) < card.text.index(sentence) < card.text.index("| WER (corpus) |")
    assert card.data.eval_results is None  # the hub's table says of every figure that it is this folder's
    recipe = (tiny_quantized / "s2quant" / "recipe.yaml").read_text("utf-8")
    assert f"```yaml\n{recipe}```" in card.text
    assert (tmp_path / "hub" / "s2quant" / "recipe.yaml").read_text("utf-8") == recipe
    record = json.loads((tmp_path / "hub" / "manifest.json").read_text("utf-8"))
    assert record["source"]["inputs"]["recipe"]["name"] == "tiny-w4a16"
    assert main([*words, "--repo", "me/it", "--push"]) == 0
    prepare(tmp_path / "hub", tmp_path / "again", tmp_path / "run", None)  # what was prepared is still that export
    assert sentence in (tmp_path / "again" / "README.md").read_text("utf-8")


@pytest.mark.parametrize("profile", EXPORTS)
def test_an_export_does_not_get_the_figures_of_others(
    profile: Profile, exports: Path, tiny_folder: Path, tmp_path: Path, evaluated: Callable[..., Path]
) -> None:
    run = evaluated({"model": folder_hashes(tiny_folder)})
    with pytest.raises(UserError, match=r"measured another model than .*model\.safetensors") as refused:
        prepare(exports / profile, tmp_path / "hub", run, None)
    assert "or of the one it was exported from" in refused.value.expected


def test_figures_of_an_export_itself_need_no_sentence(exports: Path, tmp_path: Path,
                                                      evaluated: Callable[..., Path]) -> None:  # fmt: skip
    prepare(exports / "bf16", tmp_path / "hub", evaluated({"model": folder_hashes(exports / "bf16")}), None)
    card = ModelCard.load(tmp_path / "hub" / "README.md")
    assert card.data.eval_results and "exported from" not in card.text


def test_a_changed_export_does_not_get_the_figures_of_its_source(exports: Path, tmp_path: Path,
                                                                 evaluated: Callable[..., Path]) -> None:  # fmt: skip
    """Nor does it once it is prepared: that adds nothing to the files which the export speaks of."""
    model, run = link_copy(exports / "sglang-omni", tmp_path / "copy"), evaluated({})
    without_hashes(model)
    one_byte(model)
    prepare(model, tmp_path / "hub", None, None)
    for folder in (model, tmp_path / "hub"):
        with pytest.raises(UserError, match="measured another model"):
            prepare(folder, tmp_path / "again", run, None)


def test_of_a_layout_that_is_not_read_every_file_must_be_known(exports: Path, tmp_path: Path) -> None:
    model = link_copy(exports / "vllm-omni", tmp_path / "copy")
    replace_bytes(model / "config.json", (model / "config.json").read_bytes() + b"\n")
    with pytest.raises(UserError, match=r"config\.json is not the file that manifest\.json has the hash of"):
        prepare(model, tmp_path / "hub", None, None)
    without_hashes(model)
    with pytest.raises(UserError, match=r"model\.safetensors is not in manifest\.json, and s2quant cannot read"):
        prepare(model, tmp_path / "hub", None, None)


def test_a_layout_that_is_not_read_is_named_as_such(exports: Path, tmp_path: Path) -> None:
    assert set(FOREIGN) == {name for name, layout in PROFILES.items() if layout.convert is split}
    for use in (open_checkpoint, inspect_folder, lambda folder: export_checkpoint(folder, tmp_path / "out", "bf16")):
        with pytest.raises(UserError, match="is an export for vllm-omni, in that engine's own layout"):
            use(exports / "vllm-omni")
    copy = link_copy(exports / "bf16", tmp_path / "copy")
    (copy / "manifest.json").unlink()
    (copy / "manifest.json").write_text("[]", "utf-8")  # another tool's
    assert inspect_folder(copy).faults == ()


def test_hidden_files_are_not_published(exports: Path, tmp_path: Path) -> None:
    model = link_copy(exports / "bf16", tmp_path / "copy")
    (model / ".git").mkdir()
    for name in (".env", ".git/config", "s2quant/.secret"):
        (model / name).write_text("secret", "utf-8")
    upload = prepare(model, tmp_path / "hub", None, None)
    assert not [name for name in upload.files if "/." in f"/{name}"]
    assert not [path for path in (tmp_path / "hub").rglob("*") if path.name.startswith(".")]


def test_an_export_without_figures(exports: Path, tmp_path: Path) -> None:
    prepare(exports / "bf16", tmp_path / "hub", None, None)
    assert "Speech was not measured." in (tmp_path / "hub" / "README.md").read_text("utf-8")
