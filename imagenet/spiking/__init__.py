"""The spiking neuron and the layers made of it; the same in every data set folder."""
