"""Detection, of headers' facts alone: no file is read or written."""
