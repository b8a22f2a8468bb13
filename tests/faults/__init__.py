"""What a set is worth when its writer was killed, its disk full, its bits flipped."""
