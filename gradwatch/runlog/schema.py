"""The tables of a run log and the format of their values. A run log is an SQLite file, readable from any language.

Arrays are packed as little-endian float32, one number for each layer in the order of the table ``layers``; a layer that
was added later has no number in older rows. SQLite cannot store NaN: NULL stands for NaN, or for a value that was not
measured if the row's provenance says so.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from gradwatch.records import Floats

FILE = "run.sqlite"
APPLICATION = 0x47574C47  # "GWLG", in the file's header
VERSION = 1
OF_SESSION = 10**12  # id of a row = session * OF_SESSION + step

TABLES = """
CREATE TABLE layers (
    place INTEGER PRIMARY KEY,     -- from 0: index of this layer in a packed array
    name TEXT NOT NULL,
    elements INTEGER NOT NULL,
    matrix INTEGER NOT NULL,       -- 1: two or more dimensions
    fan_in INTEGER NOT NULL
);
CREATE TABLE sessions (            -- one for each process that wrote this log, and one more each time the run went back
    session INTEGER PRIMARY KEY,   -- from 1
    pid INTEGER NOT NULL,
    host TEXT NOT NULL,
    started REAL NOT NULL,         -- seconds since 1970
    ended REAL,                    -- NULL: the session is running, or was killed
    first_step INTEGER,
    until_step INTEGER,            -- steps from here on were made again by a later session; NULL: none
    environment TEXT NOT NULL,     -- JSON: versions, rules with their settings, auto-clip, optimizer steps between rows
    facts TEXT NOT NULL,           -- JSON: model, optimizer, learning rate
    backward_order BLOB            -- int32: each layer's place in the order in which gradients arrive
);
CREATE TABLE provenances (
    provenance INTEGER PRIMARY KEY,
    source TEXT NOT NULL, clipped TEXT NOT NULL, loss TEXT NOT NULL, processes INTEGER NOT NULL
);
CREATE TABLE steps (               -- one for each row of the run, never thinned
    id INTEGER PRIMARY KEY,        -- session * 1000000000000 + step
    loss REAL, global_norm REAL, clip_coefficient REAL,
    skipped INTEGER NOT NULL,      -- 1: auto-clip skipped the optimizer step
    provenance INTEGER NOT NULL
);
CREATE TABLE norms (               -- the norms of each layer in a row; thinned
    id INTEGER PRIMARY KEY,
    keep INTEGER NOT NULL,         -- 0: deleted once it is older than the last 5,000 rows
    gradient BLOB NOT NULL,        -- L2 norms, before any clip of auto-clip
    weight BLOB                    -- L2 norms before the step's update; NULL: not sampled with this row
);
CREATE TABLE samples (             -- values of some rows only; a single number applies to all layers
    id INTEGER PRIMARY KEY,
    rate,                          -- of this row and of those after it, up to the next that is not NULL
    dead_share, unchanged,
    applied REAL                   -- factor of the user's own clip if auto-clip acted too
);
CREATE TABLE nonfinite (           -- rows with gradients or weights that are not finite
    id INTEGER PRIMARY KEY,
    gradient BLOB,                 -- a byte for each layer: 1 NaN, 2 Inf, 3 both
    weight BLOB,                   -- a byte for each layer: 1 not finite
    counts TEXT,                   -- JSON: place -> [NaN elements, infinite elements]
    culprits TEXT                  -- JSON: processes in which they arose
);
CREATE TABLE alarms (
    session INTEGER NOT NULL, step INTEGER NOT NULL, code TEXT NOT NULL, state TEXT NOT NULL,
    layer TEXT, value REAL, alarm TEXT NOT NULL  -- JSON
);
CREATE TABLE incidents (
    session INTEGER NOT NULL, number INTEGER NOT NULL, opened_step INTEGER NOT NULL, closed_step INTEGER,
    kind TEXT NOT NULL, severity TEXT NOT NULL, verdict TEXT NOT NULL, suspect TEXT, incident TEXT NOT NULL,  -- JSON
    PRIMARY KEY (session, number)
) WITHOUT ROWID;
CREATE TABLE notes (session INTEGER NOT NULL, step INTEGER NOT NULL, note TEXT NOT NULL);
CREATE TABLE flights (             -- records of the flight recorder
    session INTEGER NOT NULL, step INTEGER NOT NULL, time REAL NOT NULL, reason TEXT NOT NULL, record TEXT NOT NULL
);
CREATE TABLE clock (id INTEGER PRIMARY KEY, time REAL NOT NULL);  -- times at which some of the rows were written
CREATE TABLE latest (              -- one row: the latest state, as a live view shows it
    one INTEGER PRIMARY KEY CHECK (one = 1),
    session INTEGER NOT NULL, step INTEGER NOT NULL, time REAL NOT NULL,
    moment TEXT NOT NULL,          -- JSON
    gradient BLOB, weight BLOB, nonfinite BLOB, closeness BLOB, closest BLOB
);
CREATE VIEW line AS                -- the rows of the run, without steps that were made again later
    SELECT id, session, id % 1000000000000 AS step, loss, global_norm, clip_coefficient, skipped, provenance
    FROM steps CROSS JOIN sessions ON session = id / 1000000000000
    WHERE until_step IS NULL OR id % 1000000000000 < until_step;
"""


# Format 1 grows by tables only: logs of earlier versions lack these, and earlier versions of gradwatch ignore them.
ADDED = {
    "step_settings": """
CREATE TABLE step_settings (       -- learning rate and loss scale of a row and of those after it in its session, up to the next
    id INTEGER PRIMARY KEY,
    learning_rate REAL,            -- largest among the layers of the step's optimizer; NULL: not known
    loss_scale REAL                -- of the gradient scaler; NULL: no scaler made the step
);
""",
    "arrivals": """
CREATE TABLE arrivals (            -- of a row and of those after it in its session, up to the next
    id INTEGER PRIMARY KEY,
    arrived BLOB NOT NULL          -- a byte for each layer: 1 if a gradient was seen to arrive so far
);
""",
    "families": """
CREATE TABLE families (            -- of a row and of those after it in its session, up to the next
    id INTEGER PRIMARY KEY,
    family TEXT NOT NULL           -- of the optimizer that made the step
);
""",
    "buffers": """
CREATE TABLE buffers (             -- rows with a sample in which that changed
    id INTEGER PRIMARY KEY,
    well INTEGER NOT NULL          -- 1: all buffers of the model were finite, but for infinities of before the run
);
""",
    "tasks": """
CREATE TABLE tasks (id INTEGER PRIMARY KEY);  -- rows with which a new task begins: layers or an optimizer came
""",
}


def packed(values: NDArray[Any]) -> bytes:
    """Return values (L,) as little-endian float32; values beyond its range become infinite."""
    with np.errstate(over="ignore"):
        return values.astype("<f4").tobytes()


def unpacked(blob: bytes | None, layers: int) -> Floats:
    """Return the values of a packed array, shape (L,); those of layers that were added later are NaN.

    Raises:
        ValueError: the array is longer than there are layers.
    """
    values = np.full(layers, np.nan)
    if blob is not None:
        found = np.frombuffer(blob, dtype="<f4")
        values[: len(found)] = found
    return values


def packed_or_one(values: NDArray[Any] | None) -> bytes | float | None:
    """Return values (L,) packed, or a single number if they are all equal; None if there are none."""
    if values is None or not len(values):
        return None
    first = float(values[0])
    return first if (values == first).all() else packed(values)


def unpacked_or_one(value: bytes | float | None, layers: int) -> Floats | None:
    """Return the values that `packed_or_one` has packed, shape (L,)."""
    if value is None or isinstance(value, bytes):
        return None if value is None else unpacked(value, layers)
    return np.full(layers, float(value))
