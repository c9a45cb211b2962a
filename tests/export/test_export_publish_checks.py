"""What `publish` refuses: figures of another model, a broken folder, an engine's export."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from folder_cases import NORM, REPOSITORY, SINGLE, WQKV, change_json, change_tensors, link_copy, replace_bytes

sys.path.append(str(REPOSITORY / "tests" / "report"))
import sample

from s2quant.cli import main
from s2quant.errors import UserError
from s2quant.export.profiles import export_checkpoint
from s2quant.export.publish import prepare
from s2quant.export.publish_checks import is_model_file
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


def test_an_export_for_an_engine_is_one_message(tiny_quantized: Path, tmp_path: Path) -> None:
    exported = tmp_path / "exported"
    export_checkpoint(tiny_quantized, exported, "vllm-omni")
    with pytest.raises(UserError, match="profile vllm-omni") as refused:
        prepare(exported, tmp_path / "hub", None, None)
    assert str(refused.value).count("\n") == 2 and "the folder that it was exported from" in refused.value.todo


def test_other_exports_are_published(tiny_quantized: Path, tmp_path: Path) -> None:
    export_checkpoint(tiny_quantized, tmp_path / "exported", "bf16")
    prepare(tmp_path / "exported", tmp_path / "hub", None, None)
    assert (tmp_path / "hub" / SINGLE).is_file()
