"""From raw text to a token store, and from the store to lanes of segments that can be resumed."""
