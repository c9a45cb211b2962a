"""From nothing to s2-mini and whisper-mini: data, recognizer, codec and Dual-AR side by side on one GPU.

    python3 tools/mini/train.py --out OUT [--flite DIR] [--total 900] [--seed 0]

Every part is a process of its own and waits for the file it needs; times are seconds since the start, so a slower
machine trains less but ends in time. What is finished is copied to OUT at once and then again when it is better:
model-0000?-of-00002.safetensors, codec.pth, whisper-mini.pt and rest.tar.gz (config, tokenizer, index, logs, judgement,
samples). `--collect OUT --models DIR` makes the two folders out of them. `--small` is a run of
three minutes on two cores, of no use but as a test. `--begin-with DIR` takes codec.pth and whisper-mini.pt from an
earlier run: the codec only encodes, the recognizer goes on from there. `--dual-from DIR` goes on from a checkpoint.
"""

from __future__ import annotations

import argparse
import io
import os
import shutil
import subprocess
import sys
import tarfile
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
for folder in (ROOT, ROOT / "tools"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

PARTS = ("data", "recognizer", "codec", "dual", "judge")
SINGLE = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "codec.pth")
FINAL_CODEC, CODES = "codec.final", "codes.pt"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--work", type=Path, default=Path("/tmp/s2-mini-work"))
    parser.add_argument("--flite", type=Path, default=Path("/usr/lib/x86_64-linux-gnu"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--total", type=float, default=900, help="seconds for everything, the judge at the end included"
    )
    parser.add_argument("--recognizer-until", type=float, default=175)
    parser.add_argument("--codec-until", type=float, default=290)
    parser.add_argument("--dual-until", type=float, default=572)
    parser.add_argument("--round-trip-seconds", type=float, default=90)
    parser.add_argument("--dual-compile-at", type=float, default=95, help="not before the data is spoken")
    parser.add_argument("--count", type=int, default=30000, help="training utterances")
    parser.add_argument("--processes", type=int, default=max(1, (os.cpu_count() or 4) - 3))
    parser.add_argument("--chunks", type=int, default=112, help="of 1,000 packed rows each")
    parser.add_argument("--shifts", type=int, default=4, help="times that speech is encoded, 1/4 frame later each")
    parser.add_argument("--codec-rows", type=int, default=4)
    parser.add_argument("--dual-rows", type=int, default=48)
    parser.add_argument("--clips", type=int, default=120, help="spoken and judged at the end")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--begin-with", type=Path)
    parser.add_argument("--dual-from", type=Path)
    parser.add_argument("--dual-targets", type=int, default=10240, help="positions scored per step")
    parser.add_argument(
        "--fast-every", type=int, default=1, help="score the residual codes of each so manieth position"
    )
    parser.add_argument("--parts", default=",".join(PARTS), help="of " + ", ".join(PARTS))
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--collect", type=Path)
    parser.add_argument("--models", type=Path, default=ROOT / "models")
    parser.add_argument("--part", choices=PARTS)
    parser.add_argument("--origin", type=float, default=0.0)
    args = parser.parse_args()
    args.flite = args.flite.resolve()
    if args.small:  # shorter stretches, of its own
        args.recognizer_until, args.codec_until, args.dual_until, args.round_trip_seconds = 50, 75, 115, 8
        args.chunks, args.shifts = 6, 2
    if args.collect is None and args.out is None:
        parser.error("--out or --collect is needed")
    return args


# ---- the parts -----------------------------------------------------------------------------------------------------


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
        recognizer=part.work / "whisper-mini.pt",
        out=part.work / "judged",
        flite=part.args.flite,
        device=part.device,
        split="validation",
        clips=4 if part.args.small else part.args.clips,
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


# ---- all of it -----------------------------------------------------------------------------------------------------


def environment(threads: int) -> dict[str, str]:
    """For a part: our packages on its path, few threads, no graphics of its own."""
    paths = [str(ROOT), str(ROOT / "tools"), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(p for p in paths if p),
        "OMP_NUM_THREADS": str(threads),
        "PYTHONUNBUFFERED": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


def publish(args: argparse.Namespace, stamps: dict[str, float]) -> None:
    """Copy to OUT what has changed, each file whole or not at all."""
    sources = {name: args.work / "s2-mini" / name for name in SINGLE}
    sources["codec.pth"] = next(
        (p for p in (args.work / FINAL_CODEC, args.work / "codec.pth") if p.exists()), args.work / "none"
    )
    sources["whisper-mini.pt"] = args.work / "whisper-mini.pt"
    for name, source in sources.items():
        if source.exists() and source.stat().st_mtime != stamps.get(name):
            stamps[name] = source.stat().st_mtime
            shutil.copyfile(source, args.out / f"{name}.partial")
            (args.out / f"{name}.partial").rename(args.out / name)
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for folder in ("s2-mini", "logs", "judged"):
            for path in sorted((args.work / folder).rglob("*")):
                if path.is_file() and path.name not in SINGLE:
                    tar.add(path, arcname=str(path.relative_to(args.work)))
    partial = args.out / "rest.partial"
    partial.write_bytes(buffer.getvalue())
    partial.rename(args.out / "rest.tar.gz")


def orchestrate(args: argparse.Namespace) -> int:
    """Start all parts, publish what they make, end in time; gives the number of parts that failed."""
    args.origin = args.origin or time.time()
    shutil.rmtree(args.work, ignore_errors=True)
    (args.work / "logs").mkdir(parents=True)
    args.out.mkdir(parents=True, exist_ok=True)
    running = {}
    for name in args.parts.split(","):
        command = [
            sys.executable,
            str(Path(__file__).resolve()),
            "--part",
            name,
            *sys.argv[1:],
            "--origin",
            str(args.origin),
        ]
        running[name] = subprocess.Popen(command, env=environment(min(4, os.cpu_count() or 4)), start_new_session=False)
    stamps: dict[str, float] = {}
    failed, published = [], time.time()
    while running and time.time() < args.origin + args.total:
        time.sleep(0.25)
        for name, process in list(running.items()):
            if process.poll() is not None:
                del running[name]
                if process.returncode:
                    failed.append(name)
                    print(f"{name} failed with {process.returncode}", flush=True)
        needed = {"data": set(PARTS), "codec": set(PARTS), "dual": {"judge"}, "recognizer": {"judge"}}
        for name in [n for f in failed for n in needed.get(f, ()) if n in running]:
            running.pop(name).terminate()  # it would wait for ever
        if time.time() - published > 20:
            try:
                publish(args, stamps)
            except FileNotFoundError as error:  # replaced while it was being copied: the next time will do
                print(f"not copied yet: {error}", flush=True)
            published = time.time()
    for name, process in running.items():
        print(f"{name} is stopped: time is up", flush=True)
        process.terminate()
    publish(args, stamps)
    print(
        f"{time.time() - args.origin:.0f} s, failed: {failed or 'none'}, stopped: {list(running) or 'none'}", flush=True
    )
    for path in sorted(args.out.iterdir()):
        print(f"{path.stat().st_size:>12,} {path.name}")
    return len(failed)


def collect(out: Path, models: Path) -> None:
    """Make the two model folders out of what `orchestrate` left in OUT; logs and judgement stay beside it."""
    target = models / "s2-mini"
    target.mkdir(parents=True, exist_ok=True)
    (models / "whisper-mini").mkdir(exist_ok=True)
    with tarfile.open(out / "rest.tar.gz") as tar:
        for member in tar.getmembers():
            if member.name.startswith("s2-mini/") and member.isfile():
                file = tar.extractfile(member)
                assert file is not None
                (target / Path(member.name).name).write_bytes(file.read())
    names = [name for name in SINGLE if (out / name).exists() or not (target / "model.safetensors").exists()]
    for name in names:  # a small run has one shard, which came with the rest
        shutil.copyfile(out / name, target / name)
    shutil.copyfile(out / "whisper-mini.pt", models / "whisper-mini" / "whisper-mini.pt")


def main() -> int:
    args = arguments()
    if args.collect:
        collect(args.collect, args.models)
    elif args.part == "data":
        run_data(args)
    elif args.part:
        run = {"recognizer": run_recognizer, "codec": run_codec, "dual": run_dual, "judge": run_judge}[args.part]
        try:
            run(Part(args))
        except Exception:  # noqa: BLE001  a traceback in the log that comes back, then the exit status
            text = traceback.format_exc()
            with (args.work / "logs" / f"{args.part}.error").open("w") as file:
                file.write(text)
            print(text, flush=True)
            return 1
    else:
        return orchestrate(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
