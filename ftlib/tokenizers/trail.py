"""Who wrote which part of a rendered conversation: the loops over its messages say so.

While a loop's variable holds message i, what the template writes belongs to message i. It is the message itself that is
looked for, not a name or a list: loops over `messages[1:]`, a filtered or a reversed list are followed alike.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

NOBODY = -1  # written outside the messages, or for one that is no assistant's and which the template made up
UNCLEAR = -2  # written for an assistant's message that the template made up and that is none of ours


@dataclass
class _Loop:
    """One running loop: the message it stands at, and how many it has passed."""

    owner: int | None = None  # None: its variable is no message
    passed: dict[str, int] = field(default_factory=dict)  # role -> messages of it so far
    assigned: bool = False  # the message came by an assignment in the loop, as in loops over numbers


@dataclass
class Trail:
    """Follows the loops of one rendering over `messages`, each of which must be an object of its own."""

    messages: Sequence[Mapping[str, Any]]
    owner: int = NOBODY  # index of the message that is being written; NOBODY; or UNCLEAR
    _loops: list[_Loop] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._index = {id(message): i for i, message in enumerate(self.messages)}

    def begin(self) -> None:
        """A loop starts."""
        self._loops.append(_Loop())

    def end(self) -> None:
        """It is over."""
        self._loops.pop()
        self._settle()

    def turn(self, *values: Any) -> None:
        """Its variables got these values."""
        loop = self._loops[-1]
        loop.assigned = False
        loop.owner = None
        for value in values:
            if loop.owner is None:
                loop.owner = self._owner_of(value, loop)
        self._settle()

    def assigned(self, value: Any) -> None:
        """A variable was set in a loop: a loop over numbers picks its message so. Of two, it is unclear which."""
        if id(value) not in self._index or any(loop.owner is not None and not loop.assigned for loop in self._loops):
            return
        loop, index = self._loops[-1], self._index[id(value)]
        loop.owner = index if loop.owner in (None, index) else UNCLEAR
        loop.assigned = True
        self._settle()

    def _settle(self) -> None:
        self.owner = NOBODY
        for loop in reversed(self._loops):  # the innermost loop that stands at a message
            if loop.owner is not None:
                self.owner = loop.owner
                return

    def _owner_of(self, value: Any, loop: _Loop) -> int | None:
        if id(value) in self._index:
            index = self._index[id(value)]
            role = self.messages[index].get("role")
            loop.passed[role] = loop.passed.get(role, 0) + 1
            return index
        if not isinstance(value, Mapping) or not isinstance(role := value.get("role"), str):
            return None
        # A message of the template's making, such as neighbours joined: the next one of its role, if it says the same.
        passed = loop.passed.get(role, 0)
        loop.passed[role] = passed + 1
        following = [i for i, message in enumerate(self.messages) if message.get("role") == role][passed : passed + 1]
        unknown = UNCLEAR if role == "assistant" else NOBODY
        return next((i for i in following if _same(value, self.messages[i])), unknown)


def _same(made: Mapping[str, Any], message: Mapping[str, Any]) -> bool:
    return _words(made.get("content")) == _words(message.get("content")) and (
        (made.get("tool_calls") or None) == (message.get("tool_calls") or None)
    )


def _words(content: Any) -> str:
    """The text of a content, which may be a string, parts of text, or nothing."""
    if isinstance(content, str):
        return content.strip()
    parts = content if isinstance(content, list | tuple) else ()
    return "\n\n".join(str(part.get("text", "")) for part in parts if isinstance(part, Mapping)).strip()
