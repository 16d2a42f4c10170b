"""The data that passes between all parts, plain and frozen: rows, alarms, incidents, clip records and snapshots."""

from gradwatch.records.alarm import Alarm
from gradwatch.records.answers import ClipUse, UsualNorms
from gradwatch.records.clip_record import ClipRecord
from gradwatch.records.incident import Incident
from gradwatch.records.kinds import (
    EXPLOSION,
    SEVERITIES,
    VERDICTS,
    Behind,
    Clipped,
    CulpritSign,
    Family,
    Floats,
    Kind,
    LossSource,
    Phase,
    Role,
    RunVerdict,
    Severity,
    Sign,
    Source,
    Verdict,
)
from gradwatch.records.origin import Direction, Operand, Origin, Part, Subject, Way
from gradwatch.records.own_time import OwnTime
from gradwatch.records.row import SCALED_UP, Culprits, NonFinite, Provenance, Row, Scalars
from gradwatch.records.snapshot import Facts, Snapshot

__all__ = [
    "EXPLOSION",
    "SCALED_UP",
    "SEVERITIES",
    "VERDICTS",
    "Alarm",
    "Behind",
    "ClipRecord",
    "ClipUse",
    "Clipped",
    "CulpritSign",
    "Culprits",
    "Direction",
    "Facts",
    "Family",
    "Floats",
    "Incident",
    "Kind",
    "LossSource",
    "NonFinite",
    "Operand",
    "Origin",
    "OwnTime",
    "Part",
    "Phase",
    "Provenance",
    "Role",
    "Row",
    "RunVerdict",
    "Scalars",
    "Severity",
    "Sign",
    "Snapshot",
    "Source",
    "Subject",
    "UsualNorms",
    "Verdict",
    "Way",
]
