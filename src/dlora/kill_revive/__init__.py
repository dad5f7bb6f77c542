"""Kill and Revive: which modules train and travel, decided again and again."""
