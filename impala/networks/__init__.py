"""The agent: its torsos, its cores, PopArt, and the decoder of the auto-encoder."""
