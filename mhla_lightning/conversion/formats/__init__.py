"""What an exported folder holds, one file a format."""
