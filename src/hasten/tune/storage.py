"""The study on disk: an Optuna study in SQLite that survives ``kill -9``, a full disk and a corrupt file.

Every trial is one transaction, so what was told is kept. A trial that was running when the process died is closed as
failed and its point is tried again. A file that is not a whole database is never touched; a full disk ends the
search with one line, and the same command goes on when there is room.
"""

from __future__ import annotations

import contextlib
import logging
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hasten.errors import ConfigurationError, DataError

if TYPE_CHECKING:
    from optuna import Study

__all__ = ["guarded", "open_study"]

_FACTS = "hasten"


def _optuna() -> Any:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    logging.getLogger("sqlalchemy").setLevel(logging.CRITICAL)
    return optuna


@contextlib.contextmanager
def guarded(path: Path | None) -> Iterator[None]:
    """Turn what SQLite and SQLAlchemy raise into one :class:`~hasten.errors.DataError`; nothing told before is lost."""
    optuna = _optuna()
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (optuna.exceptions.StorageInternalError, SQLAlchemyError, sqlite3.Error) as error:
        cause: BaseException = error
        while cause.__cause__ is not None and not isinstance(cause, sqlite3.Error):
            cause = cause.__cause__
        original = getattr(cause, "orig", None) or cause
        reason = str(original).splitlines()[0] if str(original) else type(original).__name__
        raise DataError(
            f"the study {str(path)!r} cannot be used ({reason}); trials told so far are kept: free some space or "
            "repair the file, then run the same command again"
        ) from error


def _check_file(path: Path) -> None:
    """Raise unless ``path`` is absent, empty or a whole SQLite database."""
    if not path.exists() or path.stat().st_size == 0:
        return
    try:
        with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=30)) as connection:
            verdict = connection.execute("PRAGMA quick_check").fetchone()[0]
    except sqlite3.Error as error:
        verdict = str(error)
    if verdict != "ok":
        first = str(verdict).splitlines()[0]
        raise DataError(
            f"the study {str(path)!r} is not a whole SQLite database ({first}); it is left as it is: move it away, or "
            "name another file"
        )


def open_study(
    path: Path | None,
    name: str,
    directions: list[str],
    facts: dict[str, Any],
    sampler: Any,
) -> Study:
    """Open or make the study ``name``; ``facts`` identify the search and must be equal when it is resumed.

    ``path`` None keeps the study in memory. Raises :class:`~hasten.errors.DataError` for a corrupt file or a full disk,
    :class:`~hasten.errors.ConfigurationError` when the stored search is another one.
    """
    optuna = _optuna()
    if path is None:
        storage: Any = optuna.storages.InMemoryStorage()
    else:
        _check_file(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(f"no study can be kept at {str(path)!r} ({error.strerror}); name another place") from error
        with guarded(path):
            storage = optuna.storages.RDBStorage(
                f"sqlite:///{path}", engine_kwargs={"connect_args": {"timeout": 30}}, skip_compatibility_check=False
            )
    with guarded(path):
        study: Study = optuna.create_study(
            study_name=name, storage=storage, directions=directions, load_if_exists=True, sampler=sampler
        )
        stored = study.user_attrs.get(_FACTS)
        if stored is None:
            study.set_user_attr(_FACTS, facts)
        elif stored != facts:
            changed = sorted(k for k in {*stored, *facts} if stored.get(k) != facts.get(k))
            raise ConfigurationError(
                f"the study {name!r} in {str(path)!r} has another {', '.join(changed)}; name another study or file"
            )
        _close_orphans(study, optuna)
    return study


def _close_orphans(study: Any, optuna: Any) -> None:
    """Trials that were running when the process died: failed, and tried again."""
    for trial in study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.RUNNING,)):
        study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
        if trial.params:
            study.enqueue_trial(trial.params)
