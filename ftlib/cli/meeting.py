"""The address at which the processes of several nodes meet: one that cannot be it is told before anybody waits."""

import argparse
import socket

from ftlib.errors import UserError

_FIX = "give every node the same --rdzv-backend c10d --rdzv-endpoint HOST:PORT --rdzv-id NAME, HOST being one of them"


def address(args: argparse.Namespace) -> str | None:
    """HOST or HOST:PORT of torchrun's options; None where there is one node. UserError where nobody would be met."""
    if args.nnodes.rpartition(":")[2] == "1":
        return None
    if args.rdzv_endpoint:
        host, where = _host(args.rdzv_endpoint), "--rdzv-endpoint"
    elif args.rdzv_backend == "static" and args.master_addr != "127.0.0.1":
        host, where = args.master_addr, "--master-addr"
    else:
        what = f"--nnodes {args.nnodes}, and no address at which the nodes meet"
        raise UserError(what, where="--rdzv-endpoint", fix=_FIX)
    try:
        socket.getaddrinfo(host, None)
    except (OSError, UnicodeError) as error:
        what = f"no machine is called {host!r} here ({getattr(error, 'strerror', None) or error})"
        raise UserError(what, where=where, fix=_FIX) from None
    return args.rdzv_endpoint or (f"{host}:{args.master_port}" if args.master_port else host)


def _host(endpoint: str) -> str:
    """Of HOST, HOST:PORT, [IPv6] or [IPv6]:PORT."""
    endpoint = endpoint.strip()
    if endpoint.startswith("["):
        return endpoint[1:].partition("]")[0]
    return endpoint.rpartition(":")[0] if endpoint.count(":") == 1 else endpoint
