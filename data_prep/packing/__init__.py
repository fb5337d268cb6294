"""Plan, pack, finalize: from found inputs to committed shards."""
