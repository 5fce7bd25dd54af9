"""Everything that knows how one host release differs from what we need; the rest of us does not."""
