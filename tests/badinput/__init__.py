"""One named test for each refusal: its class, its code, its words, and nothing touched."""
