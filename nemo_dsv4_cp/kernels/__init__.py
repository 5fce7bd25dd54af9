"""What the device runs: index choice, attention, norm and rotary, behind one protocol."""
