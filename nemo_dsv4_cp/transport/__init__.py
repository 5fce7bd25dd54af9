"""What a rank's queries see of the other ranks' tokens: one file a transport."""
