"""Acting: actor processes, and the behaviour policy that answers them."""
