"""The paper's claims at small scale: studies, verdicts, and the page about them."""
