"""`s2quant speak`: a text to a wav file, or to raw sound on standard output."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from s2quant.cli.common import DTYPES, LINEARS, add_decoder, add_memory_limit, add_quiet, add_voice_cache, voice_cache
from s2quant.errors import UserError


def add(commands: Any) -> None:
    """Add the command."""
    command = commands.add_parser("speak", help="speak a text")
    command.set_defaults(run=_speak)
    command.add_argument("text", help="the text, with [tags] and <|speaker:0|> marks; - reads standard input")
    command.add_argument("--model", type=Path, required=True, metavar="DIR", help="a checkpoint folder")
    command.add_argument("--out", required=True, metavar="FILE", help="a wav file; - writes raw 16-bit PCM to stdout")
    command.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    command.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="dtype of the model")
    command.add_argument("--linears", choices=LINEARS, default="auto", help="quantized linears")
    add_decoder(command)
    voices = command.add_argument_group("voices, repeatable, in the order of the speakers")
    voices.add_argument("--voice", type=Path, action="append", default=[], metavar="WAV", help="a reference recording")
    voices.add_argument("--voice-text", action="append", default=[], metavar="TEXT", help="what is said in it")
    add_voice_cache(command)
    add_memory_limit(command)
    command.add_argument("--seed", type=int, default=0, help="the same seed gives the same speech")
    command.add_argument("--temperature", type=float, default=0.8)
    command.add_argument("--top-p", type=float, default=0.8)
    command.add_argument("--top-k", type=int, default=30)
    command.add_argument("--max-frames", type=int, default=1024, help="most frames (46 ms) per batch of text")
    command.add_argument("--split-sentences", action="store_true", help="speak long text sentence by sentence")
    command.add_argument("--escape", action="store_true", help="read control tokens in the text as plain characters")
    command.add_argument("--stream", action="store_true", help="write sound while it is being made")
    command.add_argument("--codes-out", type=Path, metavar="FILE.npy", help="write the codes, int64 [N, F]")
    command.add_argument("--force", action="store_true", help="replace an existing output file")
    command.add_argument("--json", action="store_true", help="print JSON")
    add_quiet(command)


def _speak(options: argparse.Namespace) -> int:
    from s2quant.runtime.speak import SpeakOptions, speak_to

    if len(options.voice) != len(options.voice_text):
        raise UserError(
            f"{len(options.voice)} --voice and {len(options.voice_text)} --voice-text",
            "a transcript for every recording",
            "give both, in the same order",
        )
    if options.text == "-":
        try:
            options.text = sys.stdin.read()
        except UnicodeDecodeError as error:
            raise UserError(f"standard input: {error}", "UTF-8 text", "convert it to UTF-8") from error
    result = speak_to(
        SpeakOptions(
            text=options.text,
            model=options.model,
            out=None if options.out == "-" else Path(options.out),
            device=options.device,
            dtype=options.dtype,
            linears=options.linears,
            decoder=options.decoder,
            voices=tuple(zip(options.voice, options.voice_text, strict=True)),
            seed=options.seed,
            temperature=options.temperature,
            top_p=options.top_p,
            top_k=options.top_k,
            max_frames=options.max_frames,
            split_sentences=options.split_sentences,
            escape=options.escape,
            stream=options.stream,
            codes_out=options.codes_out,
            overwrite=options.force,
            voice_cache=voice_cache(options),
            memory_limit_gb=options.memory_limit,
            low_memory=options.low_memory,
        ),
        sys.stdout.buffer,
    )
    decoding = result["decoding"]
    if options.decoder == "fast" and options.device != "cpu" and decoding["not_fused"]:
        print(f"s2quant speak: {decoding['text']}", file=sys.stderr)
    for note in result["notes"]:
        print(f"s2quant speak: {note}", file=sys.stderr)
    to = sys.stderr if options.out == "-" else sys.stdout
    if options.json:
        print(json.dumps(result), file=to)
    else:
        print(
            f"{options.out}: {result['audio_s']:.2f} s of sound, {result['num_frames']} frames in "
            f"{result['seconds']:.2f} s (RTF {result['rtf']:.2f}), stopped by {result['stop_reason']}",
            file=to,
        )
    if result["stop_reason"] == "full":
        print(
            "s2quant speak: the model's positions were full before the end of the text; the rest was not spoken",
            file=sys.stderr,
        )
        return 1
    return 0
