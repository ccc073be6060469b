"""What a store would cost and save: arithmetic, and the measurements it rests on."""
