# SPDX-License-Identifier: Apache-2.0
"""What the device runs: top-k selection, attention, norm and rotary, behind one protocol."""
