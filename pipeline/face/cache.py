"""The cache that `generate` carries: rows that read on, whatever padding and beams do to them.

Shapes: `B` rows, `q` tokens that come now, `E` hidden size.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers import Cache

from pipeline.errors import DataError
from pipeline.model.rows import Rows


class LongMemCache(Cache):
    """What a LongMem keeps between the steps of a generation: open segments, and what each row remembers.

    It grows with what is remembered, not with what was read: a stream has no end.
    """

    is_compileable = False

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.rows: Rows | None = None
        self._memory: Any = None
        self._length = 0

    def begin(self, rows: Rows, memory: Any) -> None:
        """Has rows that have read nothing but the memories that were given with them."""
        self.rows, self._memory = rows, memory

    def check(self, memory: Any, num_rows: int) -> None:
        """Makes sure that rows go on as they have begun.

        Args:
            memory: The memories that are given now, the same again or None.
            num_rows: Rows that come now.

        Raises:
            DataError: They are other memories, or other rows.
        """
        if memory is not None and memory is not self._memory and memory != self._memory:
            raise DataError(
                "a memory is given where rows begin, and these have begun",
                got="another memory beside past_key_values",
                do="give it with the first tokens, or leave past_key_values out",
            )
        if self.rows is not None and num_rows != len(self.rows):
            raise DataError(
                "the cache is of other rows",
                got=f"tokens of {num_rows} rows",
                expected=f"{len(self.rows)}",
                do="give the rows that it was returned for, or leave past_key_values out",
            )

    def read(self, tokens: Tensor, there: Tensor | None, *, wanted: int) -> Tensor:
        """Reads the next tokens of every row.

        Args:
            tokens: int64 `[B, q]`.
            there: Which of them there are, bool `[B, q]`; None: all.
            wanted: Of how many of the last columns something is asked.

        Returns:
            Input of the LM head `[B, wanted, E]`; 0 where no token is.
        """
        assert self.rows is not None
        self._length += tokens.shape[1]
        if there is None or bool(there.all()):
            self.rows, hidden = _read_alike(self.rows, tokens, wanted)
            return hidden
        alone, parts, order = self.rows.apart(), [], []
        model = self.rows.model
        size = (len(tokens), wanted, model.backbone.hidden_size)
        hidden = torch.zeros(size, dtype=model.dtype, device=tokens.device)
        for length in there.sum(dim=1).unique().tolist():
            numbers = (there.sum(dim=1) == length).nonzero()[:, 0]
            part = Rows.joined([alone[number] for number in numbers.tolist()])
            if length:
                own = torch.stack([tokens[number, there[number]] for number in numbers.tolist()])
                asked = there[numbers][:, there.shape[1] - wanted :]  # [rows, wanted]
                most = int(asked.sum(dim=1).max())
                part, found = _read_alike(part, own, most)
                for number, columns, row in zip(numbers.tolist(), asked, found, strict=True):
                    hidden[number, columns] = row[most - int(columns.sum()) :]
            parts.append(part)
            order += numbers.tolist()
        self.rows = Rows.joined(parts).chosen(torch.tensor(order, device=tokens.device).argsort())
        return hidden

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors that are kept; memories that were given are not counted."""
        return 0 if self.rows is None else self.rows.num_bytes

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens of this stream that were read, padding included; never what was remembered before it."""
        return self._length

    def count_anew(self) -> None:
        """What comes is counted from here: the next `generate` is given only what was not read yet."""
        self._length = 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: there is no end."""
        return -1

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Puts rows in another order: beams that go on from others."""
        if self.rows is not None and not torch.equal(beam_idx.cpu(), torch.arange(len(self.rows))):
            self.rows = self.rows.chosen(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps some rows."""
        if self.rows is not None:
            self.rows = self.rows.chosen(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every row."""
        if self.rows is not None:
            numbers = torch.arange(len(self.rows), device=self.rows.model.device)
            self.rows = self.rows.chosen(numbers.repeat_interleave(repeats))

    def reset(self) -> None:
        """Forgets everything."""
        self.rows, self._memory, self._length = None, None, 0

    def crop(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Cannot be done: what was remembered is not taken back."""
        raise DataError(
            "a LongMem cannot take tokens back that it has read",
            got="a kind of decoding that tries tokens out, such as assistant_model or prompt_lookup_num_tokens",
            do="decode greedily, by sampling or with beams",
        )


def _read_alike(rows: Rows, tokens: Tensor, wanted: int) -> tuple[Rows, Tensor]:
    """Reads tokens of rows; those that are alike in all, such as the beams of a prompt, are read once."""
    if tokens.shape[1] == 1:
        return rows, rows.read(tokens, wanted=wanted)
    leaders: dict[Hashable, int] = {}
    of_row: list[int] = []
    for row, count, new in zip(rows.rows, rows.open.num_tokens, tokens.tolist(), strict=True):
        known = (row.sources, row.place, count, tuple(row.recent), tuple(new))
        of_row.append(leaders.setdefault(known, len(leaders)))
    if len(leaders) == len(of_row):
        return rows, rows.read(tokens, wanted=wanted)
    firsts = torch.tensor([of_row.index(leader) for leader in range(len(leaders))], device=tokens.device)
    fewer, everyone = rows.chosen(firsts), torch.tensor(of_row, device=tokens.device)
    hidden = fewer.read(tokens[firsts], wanted=wanted)
    return fewer.chosen(everyone), hidden[everyone]
