"""What a batch is made of: loading, reuse and replay."""
