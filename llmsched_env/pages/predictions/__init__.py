"""The page of predicted output lengths: what they are worth."""
