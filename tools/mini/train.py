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

if __name__ == "__main__":
    root = Path(__file__).resolve().parents[2]
    sys.path[:0] = [str(root), str(root / "tools")]

from mini.parts import FINAL_CODEC, ROOT, RUNS, Part, environment, run_data

PARTS = ("data", "recognizer", "codec", "dual", "judge")
SINGLE = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "codec.pth")


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
        try:
            RUNS[args.part](Part(args))
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
