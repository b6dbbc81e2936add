"""The page that tells a run: what is shown, its pictures and its HTML."""
