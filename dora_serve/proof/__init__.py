"""The proof that what is deployed computes what was trained."""
