"""What every room does with files: write them whole, check names, show names to people, hold a folder. Imports none of them."""
