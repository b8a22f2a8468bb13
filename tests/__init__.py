"""Tests of moeconv; the folders mirror the rooms of the package."""
