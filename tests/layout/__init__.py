"""Tests of moeconv.layout."""
