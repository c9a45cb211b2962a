"""The parts of the training, each a process of its own: data, recognizer, codec, Dual-AR, judge.

They find one another's files in the work folder and wait for them. torch is imported where it is used, since the data's
processes do without.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FINAL_CODEC, CODES = "codec.final", "codes.pt"


def environment(threads: int) -> dict[str, str]:
    """For a part: our packages on its path, few threads, no graphics of its own."""
    paths = [str(ROOT), str(ROOT / "tools"), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(p for p in paths if p),
        "OMP_NUM_THREADS": str(threads),
        "PYTHONUNBUFFERED": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


class Part:
    """What a part's process needs: device, log, paths, deadlines."""

    def __init__(self, args: argparse.Namespace) -> None:
        import torch

        from mini.common import Log

        self.args, self.work, self.seed = args, args.work, args.seed
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.compiled = self.device == "cuda" and not args.no_compile
        self.log = Log(args.work / "logs" / f"{args.part}.jsonl", args.part, args.origin)
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.allow_tf32 = True
        self.log("begins", device=torch.cuda.get_device_name() if self.device == "cuda" else "cpu")

    def until(self, deadline: float):
        """A budget that ends at a time since the start; at least a little."""
        from mini.common import Budget

        return Budget(max(2.0, self.args.origin + deadline - time.time()))

    def codes(self, shift: int) -> Path:
        """The file of the codes of all speech, that many quarters of a frame later."""
        return self.work / (f"codes-{shift}.pt" if shift else CODES)

    def speech(self, split: str, num_parts: int):
        from mini.common import Speech

        speech = Speech(self.work / "data", self.device, split)
        speech.wait(num_parts, self.log)
        return speech


def run_recognizer(part: Part) -> None:
    import torch

    from mini import recognizer
    from mini.codec import load_codes, round_trip
    from mini.common import Speech, wait_for
    from s2quant.codec import load_codec

    args, small = part.args, part.args.small
    dims = recognizer.DIMS | ({"n_audio_layer": 1, "n_text_layer": 1} if small else {})
    if args.begin_with:
        dims = torch.load(args.begin_with / "whisper-mini.pt", weights_only=True)["dims"]
    trainer = recognizer.Trainer(dims, part.device, part.seed, part.log, compiled=False)
    train, check = part.speech("train", 12), part.speech("validation", 1)
    size = 2 if small else 48
    path = part.work / "whisper-mini.pt"
    if args.begin_with:
        trainer.load(args.begin_with / path.name)
    batches = recognizer.Batches([train], trainer.tokenizer, size, part.seed, recognizer.MAX_SECONDS)
    peak = 3e-4 if args.begin_with else 2e-3
    trainer.train(batches, part.until(args.recognizer_until), peak, path, check, [train])

    wait_for(part.work / CODES, part.log)
    train = Speech.whole(part.work / "data", part.device, "train", part.log)
    codec = load_codec(part.work / FINAL_CODEC, device=part.device)
    saved = load_codes(part.work / CODES, train=train, validation=check)
    heard = [
        recognizer.to_recognizer(w[None])[0]
        for w in round_trip(codec, saved["validation"], check, range(len(check.rows)))
    ]
    before = recognizer.word_error_rate(trainer.model, check, len(heard), heard)
    raw = recognizer.word_error_rate(trainer.model, check, len(heard))
    part.log("round trips", raw_wer=raw, wer_before=before)
    decoded = decoded_speech(codec, saved["train"], train, 8 if small else 6000)
    both = recognizer.Batches([train, decoded], trainer.tokenizer, size, part.seed + 1, recognizer.MAX_SECONDS)
    left = min(time.time() - args.origin + args.round_trip_seconds, args.dual_until)
    trainer.train(both, part.until(left), 5e-4, path, check, [])
    part.log(
        "round trips seen",
        raw_wer=recognizer.word_error_rate(trainer.model, check, len(heard)),
        wer_after=recognizer.word_error_rate(trainer.model, check, len(heard), heard),
    )


def decoded_speech(codec, codes, speech, count: int):
    """The first utterances as the codec gives them back, as a store of their own."""
    import numpy as np
    import torch

    from mini.codec import round_trip
    from mini.common import Speech
    from mini.recognizer import to_recognizer

    other = Speech(speech.folder, speech.device)
    other.rows = speech.rows[:count]
    pieces = []
    for first in range(0, len(other.rows), 256):
        sounds = round_trip(codec, codes, speech, range(first, min(first + 256, len(other.rows))))
        pieces += [(to_recognizer(w[None])[0].clamp(-1, 1) * 32767).short() for w in sounds]
    other.samples = np.array([len(p) for p in pieces], np.int64)
    other.frames = speech.frames[:count]
    other.phones = speech.phones[: int(other.frames.sum())]
    other.audio = torch.cat(pieces)
    return other


def run_codec(part: Part) -> None:
    import torch

    from mini import codec
    from mini.common import Speech
    from s2quant.codec import load_codec

    if part.args.begin_with is None:
        train_codec(part)
    else:
        (part.work / "codec.partial").write_bytes((part.args.begin_with / "codec.pth").read_bytes())
        (part.work / "codec.partial").rename(part.work / FINAL_CODEC)

    # The codes are those of the file that is shipped, in full float32.
    torch.backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.benchmark = False
    shipped = load_codec(part.work / FINAL_CODEC, device=part.device)
    splits = ("train", "validation")
    stores = {split: Speech.whole(part.work / "data", part.device, split, part.log) for split in splits}
    started = time.time()
    codes = {split: codec.encode_all(shipped, store) for split, store in stores.items()}
    codec.save_codes(part.work / CODES, codes, stores)
    part.log(
        "encoded",
        seconds=time.time() - started,
        bits=codec.entropies(codes["validation"]),
        frames=codes["train"].shape[1],
    )
    for shift in range(1, part.args.shifts):  # other codes of the same words, so that none are learned by heart
        started, store = time.time(), stores["train"].shifted(shift)
        codec.save_codes(part.codes(shift), {"train": codec.encode_all(shipped, store)}, {"train": store})
        part.log("encoded", shift=shift, seconds=time.time() - started)


def train_codec(part: Part) -> None:
    import torch

    from mini import codec
    from mini.common import compiled_or_not, release_memory
    from s2quant.codec import CodecConfig

    torch.backends.cudnn.benchmark = True
    small = part.args.small
    config = (
        CodecConfig(**vars(codec.CONFIG) | {"encoder_dim": 4, "decoder_dim": 32, "latent_dim": 64})
        if small
        else codec.CONFIG
    )
    rows, row_frames = (1, 8) if small else (part.args.codec_rows, 128)
    trainer = codec.Trainer(config, part.device, part.seed, part.log, part.compiled, rows, row_frames)
    if part.device == "cuda":
        compiled_or_not(trainer.warm_up, trainer.give_up_compiling, part.log)
    train = part.speech("train", 12)
    path = part.work / "codec.pth"
    trainer.train(train, part.until(part.args.codec_until), 1e-3, path)
    shutil.copyfile(path, part.work / "codec.partial")
    (part.work / "codec.partial").rename(part.work / FINAL_CODEC)
    del trainer
    release_memory()


def run_dual(part: Part) -> None:
    from mini import dual
    from mini.common import compiled_or_not, wait_for
    from mini.tokenizer import write_tokenizer

    args, small = part.args, part.args.small
    raw = (
        dual.config_json(dim=128, slow_layers=1, fast_layers=1, slow_ffn=128, fast_ffn=128)
        if small
        else dual.config_json()
    )
    folder = part.work / "s2-mini"
    for needed in (folder, part.work / "tokenizer"):
        needed.mkdir(exist_ok=True)
    write_tokenizer(part.work / "tokenizer", raw["audio_decoder_config"]["vocab_size"])
    trainer = dual.Trainer(
        raw,
        part.device,
        part.seed,
        part.log,
        part.compiled,
        1 if small else args.dual_rows,
        64 if small else args.dual_targets,
        args.fast_every,
    )
    if args.dual_from:
        trainer.load(args.dual_from)
    part.log("sizes", parameters=dual.num_parameters(trainer.model))
    if part.device == "cuda":
        time.sleep(max(0.0, args.origin + args.dual_compile_at - time.time()))
        compiled_or_not(trainer.warm_up, trainer.give_up_compiling, part.log)

    rows_folder = part.work / "rows"
    command = [sys.executable, "-m", "mini.prompts", "--data", part.work / "data"]
    command += ["--codes", *(part.codes(shift) for shift in range(args.shifts))]
    command += ["--tokenizer", part.work / "tokenizer", "--out", rows_folder, "--chunks", args.chunks]
    command += ["--length", dual.LENGTH, "--seed", part.seed, "--processes", args.processes]
    if small:
        command += ["--rows", 40]
    builder = subprocess.Popen([str(word) for word in command], cwd=ROOT / "tools", env=environment(1))
    wait_for(part.work / CODES, part.log)
    rows, check = (dual.Rows(rows_folder, part.device, validation) for validation in (False, True))
    while rows.refresh() == 0 or check.refresh() == 0:
        time.sleep(0.2)
        assert builder.poll() in (None, 0), "packing failed"

    def save() -> None:
        fresh = part.work / "s2-mini.new"
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir()
        dual.write_model(fresh, raw, trainer.model)
        for path in fresh.iterdir():
            path.replace(folder / path.name)

    part.log("training begins", rows=rows.refresh())
    again, easy_until = (0.3, 0.0) if args.dual_from else (1.0, dual.EASY_UNTIL)
    until = part.until(args.dual_until)
    trainer.train(rows, check, until, 0.02 * again, 1.5e-3 * again, save, easy_until)
    if builder.poll() is None:  # no time was left for all shifts
        builder.terminate()
    (part.work / "dual.done").touch()


def run_judge(part: Part) -> None:
    from mini import judge
    from mini.common import wait_for

    for name in ("dual.done", FINAL_CODEC, "whisper-mini.pt"):
        wait_for(part.work / name, part.log)
    shutil.copyfile(part.work / FINAL_CODEC, part.work / "s2-mini" / "codec.pth")
    options = judge.Options(
        model=part.work / "s2-mini",
        asr_model=part.work / "whisper-mini.pt",
        out=part.work / "judged",
        flite=part.args.flite,
        device=part.device,
        split="validation",
        limit=4 if part.args.small else part.args.clips,
        max_frames=16 if part.args.small else 400,
        num_slots=4 if part.args.small else 80,
        keep=24,
    )
    part.log("judged", **judge.run(options))


def run_data(part_args: argparse.Namespace) -> None:
    from mini import speech

    os.nice(10)  # the compilers of the other parts come first
    count, held_out = (40, 40) if part_args.small else (part_args.count, 400)
    size = 20 if part_args.small else 250
    frames = speech.generate(
        part_args.work / "data", count, held_out, part_args.seed, part_args.flite, part_args.processes, size
    )
    seconds = time.time() - part_args.origin
    print(
        f'{{"part": "data", "frames": {frames}, "hours": {frames * speech.FRAME_S / 3600:.2f}, "t": {seconds:.1f}}}',
        flush=True,
    )


RUNS = {"recognizer": run_recognizer, "codec": run_codec, "dual": run_dual, "judge": run_judge}
