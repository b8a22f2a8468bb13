"""What other programs need of moeconv, one file each."""
