"""Our models as classes of other libraries."""
