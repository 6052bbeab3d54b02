"""Large annotation files and shards, read entry by entry."""
