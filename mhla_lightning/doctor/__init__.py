"""The checks of `mhla doctor`: each one is a function without arguments that returns a Finding. Library code: prints nothing."""
