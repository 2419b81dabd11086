"""What every run needs around its model; the same in every data set folder."""
