"""The cloud half: a frozen model that asks the edge for its adapters' deltas."""
