"""The gate: rules that find what would spoil a training, each with a code, a name and a severity."""
