"""The torch path: any device, and what every other kernel is compared with."""
