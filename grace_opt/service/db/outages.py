"""What went wrong: the storage is away, or something cannot be stored at all. An outage passes; the other does not."""

from __future__ import annotations

import errno
import sqlite3
from collections.abc import Iterator

from sqlalchemy import exc

#: Of these an operating system says that the *name* or the size is wrong, which waiting does not mend.
_WRONG_FOREVER = (errno.ENAMETOOLONG, errno.EINVAL, errno.EILSEQ, errno.EFBIG, errno.EOVERFLOW)
_FULL = (errno.ENOSPC, errno.EDQUOT)


class ReplacedError(exc.SQLAlchemyError):
    """The file under the database's name is not the one that was opened."""


def is_outage(error: BaseException) -> bool:
    """Whether trying again later may help: a database or a disk that is away or full, not a value that it refuses.

    What an `InputError` was raised from counts, as it says what the operating system said.
    """
    return any(map(_away, _chain(error)))


def is_full(error: BaseException) -> bool:
    """Whether a disk is full, the database's or ours."""
    return any(_is_full(each) for each in _chain(error))


def reason(error: BaseException) -> str:
    """The first line of what a database's own driver said, or of any other error."""
    return str(getattr(error, "orig", error)).strip().partition("\n")[0]


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__


def _away(error: BaseException) -> bool:
    if isinstance(error, exc.DBAPIError):
        return error.connection_invalidated or _database_away(error)
    if isinstance(error, exc.TimeoutError | ReplacedError):  # no connection was free in time; another file
        return True
    return isinstance(error, OSError) and error.errno not in (None, *_WRONG_FOREVER)


def _database_away(error: exc.DBAPIError) -> bool:
    code = getattr(error.orig, "sqlite_errorcode", None)
    if code is not None and code & 0xFF == sqlite3.SQLITE_ERROR:  # "no such table", "too many variables"
        return False
    if (getattr(error.orig, "sqlstate", None) or "").startswith("54"):  # a program's limit: a row, a key too large
        return False
    return isinstance(error, exc.OperationalError | exc.InterfaceError)


def _is_full(error: BaseException) -> bool:
    if isinstance(error, exc.DBAPIError):
        code = getattr(error.orig, "sqlite_errorcode", None)
        return code == sqlite3.SQLITE_FULL or getattr(error.orig, "sqlstate", None) == "53100"
    return isinstance(error, OSError) and error.errno in _FULL
