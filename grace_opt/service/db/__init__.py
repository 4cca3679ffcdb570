"""The service's database and files."""
