"""The agent: its torsos, its recurrent core, PopArt, and the decoder of the auto-encoder."""
