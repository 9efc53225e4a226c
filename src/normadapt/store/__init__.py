"""What must outlive the process: snapshots of an adapted model, which one is in use, and a log of what was done."""

from normadapt.store.log import OWN_KINDS
from normadapt.store.records import Command, Event, Snapshot, Verification
from normadapt.store.store import Store

__all__ = ["OWN_KINDS", "Command", "Event", "Snapshot", "Store", "Verification"]
