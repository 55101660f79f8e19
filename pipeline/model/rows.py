"""Rows that read on, each at its own pace: what generation needs of a stream.

The same reading as `Stream`'s, in pieces: tokens come a few at a time, a full segment is remembered by itself, and the
next begins with its left context, exactly as training cuts a text. Rows may stand at different places, remember apart,
share what was remembered before they parted, and be put in another order; what is remembered is never copied for that.

Shapes: `B` rows, `q` tokens that are read now, `T` segment tokens, `N` tokens of left context, `E` hidden size, `W`
columns of a cache: each row's tokens end in the last one.
"""

from __future__ import annotations
