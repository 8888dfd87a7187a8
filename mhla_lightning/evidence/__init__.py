"""The claims of the paper at the scale of a small machine: studies, verdicts, and the page about them."""
