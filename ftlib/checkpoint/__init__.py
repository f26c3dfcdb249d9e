"""Resumable training state: what is saved, how it is published, how a damaged copy is found and passed over."""

from ftlib.checkpoint.agree import Ranks, exchange, together
from ftlib.checkpoint.final import final_folder, publish, staging
from ftlib.checkpoint.saver import Saver, State
from ftlib.checkpoint.signals import StopFlag, stop_agreed
from ftlib.checkpoint.verify import newest_good, verify

__all__ = [
    "Ranks", "Saver", "State", "StopFlag", "exchange", "final_folder", "newest_good", "publish", "staging",
    "stop_agreed", "together", "verify",
]
