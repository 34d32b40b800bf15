"""The figures of a study. Colour-blind readers can distinguish the colours, and dashes and marks work in print."""
