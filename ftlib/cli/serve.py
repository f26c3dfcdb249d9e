"""Serve a model to OpenAI's clients: a folder, a Hub id, `ftlib:demo/model`, or the folder of an adapter.

    tune serve MODEL [--adapter DIR] [--port 8000]

Base URL http://127.0.0.1:8000/v1, paths /v1/models, /v1/completions and /v1/chat/completions, with streaming. All
clients share one running batch. Only this machine can connect unless --host says otherwise, which needs --api-key.
"""

import argparse
import os
import signal
import sys
from collections.abc import Sequence

from ftlib.cli.arguments import Parser
from ftlib.errors import UserError

LOOPBACK = ("127.0.0.1", "localhost", "::1")
KEY = "FTLIB_API_KEY"


def main(argv: Sequence[str]) -> int:
    """`tune serve MODEL [--adapter DIR] …`"""
    args = _parse(argv)
    from ftlib.cli import loading  # torch comes here, so that a wrong option answers at once
    from ftlib.generation import Engine
    from ftlib.generation.engine import token_room
    from ftlib.serving.server import Server
    from ftlib.serving.service import Service

    model, tokenizer, device, *_ = loading.named(args)
    context = args.context or model.arch.max_positions or 4096
    room = args.kv_tokens or token_room(model, args.max_batch * context)
    engine = Engine(model, max_batch=args.max_batch, max_tokens=room, compile=args.compile)
    service = Service(engine)
    name = args.name or (os.path.basename(os.path.abspath(args.model)) if os.path.exists(args.model) else args.model)
    try:
        server = Server((args.host, args.port), service, tokenizer, name, min(context, engine.longest), args.api_key)
    except OSError as error:
        raise UserError(f"{args.host}:{args.port} cannot be taken: {error.strerror}", fix="another --port") from None
    where = f"http://{args.host}:{server.server_address[1]}/v1"
    print(f"{name} on {device} at {where}; {server.context:,} tokens a request, {room:,} in all; Ctrl-C ends")
    sys.stdout.flush()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        pass
    finally:
        server.server_close()
        service.close()
    return 0


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser("serve", __doc__)
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("--adapter", metavar="DIR", help="a LoRA adapter in PEFT format for MODEL")
    parser.add_argument("--code", metavar="FILE.py:CLASS", help="your own decoder class: model.code of its run")
    parser.add_argument("--host", default="127.0.0.1", help="default: 127.0.0.1, which only this machine reaches")
    parser.add_argument("--port", type=int, default=8000, help="default: 8000; 0: any that is free")
    parser.add_argument("--api-key", default=os.environ.get(KEY), metavar="KEY", help=f"clients must show it; or {KEY}")
    parser.add_argument("--name", help="of the model for clients (default: the folder's or the Hub id)")
    parser.add_argument("--context", type=int, metavar="N", help="most tokens of prompt and answer")
    parser.add_argument("--max-batch", type=int, default=64, metavar="N", help="answers that run at once (default: 64)")
    parser.add_argument("--kv-tokens", type=int, metavar="N", help="keys and values held (default: what fits)")
    parser.add_argument("--compile", choices=("auto", "graphs", "off"), default="graphs", help="as Engine has it")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), help="default: bf16 on a GPU, fp32 on a CPU")
    parser.add_argument("--device", help="default: the GPU if there is one")
    args = parser.parse(argv)
    if min(args.max_batch, args.context or 1, args.kv_tokens or 1) < 1 or not 0 <= args.port < 1 << 16:
        raise UserError("tune serve: --max-batch, --context and --kv-tokens are at least 1, --port below 65536")
    if args.host not in LOOPBACK and not args.api_key:
        raise UserError(f"whoever reaches {args.host} could use the model", where="--host", fix="set --api-key")
    return args
