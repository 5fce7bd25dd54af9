# SPDX-License-Identifier: Apache-2.0
"""What the device runs: index choice, attention, norm and rotary, behind one protocol."""
