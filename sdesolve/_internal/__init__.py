"""What several parts of the package share and no user sees: parsing of arguments, cached copies of constants."""
